// Numbers of repeated measurements: medians and other quantiles of raw samples.

export interface Quantiles {
  median: number;
  p10: number;
  p90: number;
  p99: number;
  min: number;
}

/**
 * The value below which a part `q` (0 to 1) of the samples lies, with straight lines between neighbours.
 * NaN for no samples.
 */
export function quantile(samples: readonly number[], q: number): number {
  const sorted = [...samples].sort((a, b) => a - b);
  const at = (sorted.length - 1) * q;
  const low = sorted[Math.floor(at)] ?? Number.NaN;
  const high = sorted[Math.ceil(at)] ?? Number.NaN;
  return low + (high - low) * (at - Math.floor(at));
}

export function quantiles(samples: readonly number[]): Quantiles {
  return {
    median: quantile(samples, 0.5),
    p10: quantile(samples, 0.1),
    p90: quantile(samples, 0.9),
    p99: quantile(samples, 0.99),
    min: quantile(samples, 0),
  };
}

export function mean(samples: readonly number[]): number {
  return samples.reduce((sum, x) => sum + x, 0) / samples.length;
}
