"""What people look at: reports of runs, sweeps over settings, and comparisons with baselines."""
