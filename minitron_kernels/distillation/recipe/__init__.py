"""The whole recipe by one command and one TOML: correct, score, plan, prune, distill, evaluate, compare."""
