"""Sampling from the policy: batched decoding with a KV cache."""
