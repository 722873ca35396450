"""Forms of an adapter for servers that know no bias: a LoRA of rank 1."""
