"""Learning cache schedules for Diffusion Transformers, in plain PyTorch: no Triton, no runtime."""
