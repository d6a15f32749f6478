from kvarn_ops.lowering.source_pass import SourcePass as SourcePass
from kvarn_ops.lowering.source_pass import inductor_options as inductor_options
