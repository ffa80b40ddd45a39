"""Text from a live, sharded model: decoding with a key-value cache, and answers to a file of prompts."""
