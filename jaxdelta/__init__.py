"""jaxdelta: what each layer of a Qwen3 model writes into its residual stream."""
