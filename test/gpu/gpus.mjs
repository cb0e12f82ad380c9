// What `--gpus` means to the scripts: `8` GPUs, or the device of each rank, of which several may share one: `0,0,1,1`.

import { must } from './harness.mjs';

export class Gpus {
  #devices;

  constructor(text) {
    this.text = text;
    this.#devices = text.includes(',') ? text.split(',') : null;
    /** Ranks at most. */
    this.count = this.#devices?.length ?? Number(text);
    must(
      this.count >= 1 && Number.isInteger(this.count),
      `--gpus ${text}: a number, or device numbers with commas`,
    );
  }

  /** Numbers of ranks to measure: 1, 2, 4 and 8 as far as they go. */
  get degrees() {
    return [1, 2, 4, 8].filter((ranks) => ranks <= this.count);
  }

  /** Collectives on the device: NCCL refuses ranks that share a card. */
  get collectives() {
    return new Set(this.#devices).size === (this.#devices?.length ?? 0) ? ['peer', 'nccl'] : ['peer'];
  }

  /** Cards that there must be. */
  get cards() {
    return this.#devices ? 1 + Math.max(...this.#devices.map(Number)) : this.count;
  }

  /** What tp-run's own `--gpus` gets for `ranks` of them, spread over as many cards as possible. */
  flag(ranks) {
    if (!this.#devices || ranks === 1) return `${ranks}`;
    const apart = this.count / ranks;
    return this.#devices.filter((_, i) => i % apart === 0).join(',');
  }
}
