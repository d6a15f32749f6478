from kvarn_ops.lowering.hooks import inductor_options as inductor_options
