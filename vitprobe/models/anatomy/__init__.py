"""Where a Vision Transformer keeps its blocks, takes its images and places its tokens, for each way of writing one."""
