"""What the commands do with a net: count it (summary), ask it (classify), write it for others (exporting)."""
