"""What the commands minitron-prune and minitron-distill share."""
