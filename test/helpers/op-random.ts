// Fresh numbers for every run of the op tests. The seed of a failed run is printed; set REPLAY to see it again.

import { randomInt } from 'node:crypto';
import { beforeEach } from 'vitest';
import type { Dtype } from '../../src/native.js';
import { rounding } from './reference.js';

const REPLAY: number | null = null;

/** A stream of numbers that starts again, keyed by the test's title, at the beginning of every test of the file. */
export function freshRandom(): Random {
  const random = new Random(REPLAY ?? randomInt(2 ** 32));
  beforeEach(({ task, onTestFailed }) => {
    random.restart(task.name);
    onTestFailed(() => console.log(`op-random.ts: REPLAY = ${random.seed} shows this failure again`));
  });
  return random;
}

export class Random {
  private state = 0;

  constructor(readonly seed: number) {}

  restart(title: string) {
    this.state = [...title].reduce((hash, c) => Math.imul(hash ^ c.codePointAt(0)!, 0x01000193), this.seed);
  }

  /** 32 random bits. */
  bits(): number {
    this.state = (this.state + 0x6d2b79f5) | 0;
    let x = Math.imul(this.state ^ (this.state >>> 15), this.state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return (x ^ (x >>> 14)) >>> 0;
  }

  below(limit: number): number {
    return Math.floor((this.bits() / 2 ** 32) * limit);
  }

  key(): [number, number] {
    return [this.bits(), this.bits()];
  }

  /** `count` values with standard deviation `deviation`, spread evenly; bfloat16 values where a run rounds them. */
  values(count: number, dtype: Dtype, deviation = 1): Float32Array {
    const r = rounding(dtype);
    return Float32Array.from({ length: count }, () =>
      r((this.bits() / 2 ** 31 - 1) * Math.sqrt(3) * deviation),
    );
  }
}
