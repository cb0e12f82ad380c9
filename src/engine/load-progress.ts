// How far the weights are, over all ranks.

export class LoadProgress {
  readonly #ranks = new Map<number, { done: number; total: number }>();
  readonly #startedAt = performance.now();

  /** Takes in the bytes that a rank has loaded and has to load; `weights 1.5 of 12.0 GB, 0.75 GB/s` */
  add(rank: number, bytes: { done: number; total: number }): string {
    this.#ranks.set(rank, bytes);
    const sum = (key: 'done' | 'total') =>
      [...this.#ranks.values()].reduce((n, part) => n + part[key], 0) / 1e9;
    const seconds = (performance.now() - this.#startedAt) / 1000;
    return `weights ${sum('done').toFixed(1)} of ${sum('total').toFixed(1)} GB, ${(sum('done') / seconds).toFixed(2)} GB/s`;
  }
}
