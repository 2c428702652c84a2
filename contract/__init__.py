"""What training, export and server share: the bundle and its text resources. Stdlib, numpy and tokenizers only."""
