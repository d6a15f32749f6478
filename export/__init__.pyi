from kvarn_ops.export.onnx_model import to_onnx as to_onnx
from kvarn_ops.export.program import export_program as export_program
