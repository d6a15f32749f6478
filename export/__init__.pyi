from .aoti import aot_compile as aot_compile
from .program import export_program as export_program
