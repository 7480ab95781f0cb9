"""From shards to a rank's micro-batches: stored samples, the samples of step k, and their tensors.

  stored samples   schema (manifest, fingerprint) and fit (does it match a config); sizes (the bucket of a clip); tar
                   and mds (formats), index (the sidecar), shards (writing), samples (verified reading), arrays and
                   latents (decoding of fields)
  samples of step  plan (step -> ids, integers only) on orders (permutations in closed form) and buckets (costs);
                   shares (a batch over ranks and micro-batches); coverage and idle (samples used, ranks left idle)
  tensors          video (decoding), items (one slot, replaced if damaged), images (joint training), batches (a
                   micro-batch), loader (worker processes) and ring (their shared memory)

The plan depends on neither ranks nor files, and the content of a slot only on (seed, step, index). Any number of ranks,
workers and micro-batches therefore reads the same samples.
"""
