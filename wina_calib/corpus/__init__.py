"""Text in, blocks of tokens out."""
