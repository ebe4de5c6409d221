"""What a distillation step on many ranks holds and sends, on paper: plan_distillation()."""
