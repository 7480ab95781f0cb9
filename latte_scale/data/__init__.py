"""From shards to a rank's micro-batches: what is where, which samples form step k, and their tensors.

  what is stored   schema (manifest, fingerprint) and fit (does it fit a config); sizes (which bucket a clip is of); tar
                   and mds (the formats), index (the sidecar), shards (writing), samples (checked reading), arrays and
                   latents (what the bytes are)
  which samples    plan (step -> ids, integers only) on orders (closed forms) and buckets (costs); shares (a batch over
                   ranks and micro-batches); coverage and idle (what a run will see, and what of it is idle)
  their tensors    video (decoding), items (one slot, replaced if it is damaged), images (joint training), batches (a
                   micro-batch), loader (worker processes) and ring (their shared memory)

The decision worth knowing: the plan knows neither ranks nor files, and what a slot holds depends on (seed, step, index)
alone; so any number of ranks, workers and micro-batches reads the same samples.
"""
