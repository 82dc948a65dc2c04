"""A run over an archive: settings, plan, stages, jobs, and what it tells of itself."""
