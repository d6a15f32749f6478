from .aoti import aot_compile as aot_compile
from .onnx_model import to_onnx as to_onnx
from .program import export_program as export_program
