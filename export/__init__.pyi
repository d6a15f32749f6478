from .program import export_program as export_program
