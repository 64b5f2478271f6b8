"""Images: sources of them, the packaged photographs, the transforms that models expect."""
