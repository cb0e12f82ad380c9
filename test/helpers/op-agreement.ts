// How close native results are to the reference. Both are right when a value lies within rounding of a tie between
// two bfloat16 values, so those may differ by a unit in the last place; nearly all must be equal.

import { expect } from 'vitest';
import type { Dtype } from '../../src/native.js';
import type { Matrix } from './reference.js';

/** Of float32 results. */
const RELATIVE = 1e-5;
export class Agreement {
  private same = 0;
  private all = 0;

  /**
   * `rounded`: results are bfloat16 values that may be `ulps` apart. Both bounds count at the size of the row's largest
   * element, or at `floor` where results come from larger values that cancel. A `share` of them must be the very same.
   */
  constructor(
    private readonly rounded: boolean,
    private readonly ulps = 1,
    private readonly floor = 0,
    private readonly share = 0.99,
  ) {}

  static of(dtype: Dtype, ulps?: number, floor?: number, share?: number): Agreement {
    return new Agreement(dtype === 'bfloat16', ulps, floor, share);
  }

  /** Compares rows; NaN never agrees. */
  add(got: Float32Array, want: Matrix, where: string) {
    const width = want[0]?.length ?? 0;
    expect(got.length, `elements of ${where}`).toBe(want.length * width);
    for (const [row, values] of want.entries()) {
      const size = values.reduce((max, value) => Math.max(max, Math.abs(value)), this.floor);
      const bound = this.rounded ? this.ulps * ulp(size) : RELATIVE * size;
      for (const [i, value] of values.entries()) {
        const found = got[row * width + i]!;
        if (!(Math.abs(found - value) <= bound))
          expect.fail(`${where}: row ${row}, element ${i} is ${found}, not ${value} (within ${bound})`);
        this.same += found === value ? 1 : 0;
        this.all++;
      }
    }
  }

  /** Call when all is compared. */
  finish() {
    expect(this.all).toBeGreaterThan(0);
    if (!this.rounded) return;
    // Few elements may differ even where there are few.
    const allowed = Math.max(8, (1 - this.share) * this.all);
    expect(this.all - this.same, `differing elements of ${this.all}`).toBeLessThanOrEqual(allowed);
  }
}

/** A bfloat16 unit in the last place at `size`. */
function ulp(size: number): number {
  return size === 0 ? 0 : 2 ** (Math.floor(Math.log2(size)) - 7);
}
