"""Training: the default model's recipe (`tiny`), the paper's loss (`svr`) and the Smooth-LoRA loop (`smooth_lora`)."""
