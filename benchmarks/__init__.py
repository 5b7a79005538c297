"""Speed and memory, as ratios measured side by side in one run. The tests only see that each program runs."""
