"""From scores to a plan: the sizes of the smaller model, and the channels, heads, experts and layers kept."""
