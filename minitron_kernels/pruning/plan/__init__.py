"""From scores to a plan: how much goes, and which channels, heads, experts and layers stay."""
