"""Checkpoints that timm lacks, as their authors released them: where they lie, what to build, how keys translate."""
