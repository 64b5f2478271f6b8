"""What the attention of a block is made of: its factors, and one exact pass over its rows."""
