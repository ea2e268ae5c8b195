"""Fine-tuning: SFT, LoRA, QLoRA and DPO on a mesh, exact to resume."""
