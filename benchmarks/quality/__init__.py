"""What weights lose by quantization: perplexity against bytes, and weight error against the rate-distortion bound."""
