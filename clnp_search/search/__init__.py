"""Ray: grid points, packs, trials and where they run."""
