"""From data files to samples: readers, tasks and, for experiments, partitions."""
