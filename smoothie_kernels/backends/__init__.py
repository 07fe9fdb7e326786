"""One module per backend, each with the same five functions:

supports(device_type, dtype) -> why not, or None
column_bias(embeddings) -> [V]
step_fwd(x, embeddings, bias, mu, std, row_ids, row_offset, seed, offset, sigma_min)
    -> smoothed [N, D], tokens [N], noisy_tokens [N], lse [N];  std is None where there is no noise
nearest_fwd(x, embeddings, bias) -> tokens [N], distance [N]
gaussian(out, row_ids, row_offset, seed, offset) -> out
"""
