import { describe, expect, it } from 'vitest';
import { mean, quantile, quantiles } from '../../src/report/stats.js';

describe('quantile', () => {
  it('draws straight lines between neighbours, whatever their order', () => {
    expect(quantile([3, 1, 2], 0.5)).toBe(2);
    expect(quantile([4, 1, 3, 2], 0.5)).toBe(2.5);
    expect(quantile([10, 20], 0.1)).toBeCloseTo(11, 12);
    expect(quantile([5], 0.99)).toBe(5);
  });

  it('sorts numbers, not words, and leaves its samples as they were', () => {
    const samples = [10, 9, 100];
    expect(quantile(samples, 1)).toBe(100);
    expect(samples).toEqual([10, 9, 100]);
  });

  it('is no number without samples', () => {
    expect(quantile([], 0.5)).toBeNaN();
    expect(mean([])).toBeNaN();
  });

  it('gives all of them at once', () => {
    const samples = Array.from({ length: 101 }, (_, i) => i);
    expect(quantiles(samples)).toEqual({ median: 50, p10: 10, p90: 90, p99: 99, min: 0 });
  });
});
