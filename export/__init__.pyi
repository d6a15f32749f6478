from kvarn_ops.export.aoti import aot_compile as aot_compile
from kvarn_ops.export.comparison import Comparison as Comparison
from kvarn_ops.export.comparison import compare as compare
from kvarn_ops.export.onnx_model import to_onnx as to_onnx
from kvarn_ops.export.program import export_program as export_program
from kvarn_ops.export.program import save_program as save_program
from kvarn_ops.export.tensorrt import to_tensorrt as to_tensorrt
