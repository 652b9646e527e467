"""LoRA: low-rank adapters beside the frozen projections of a network, made by peft and trained by `fit`."""
