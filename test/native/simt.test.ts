import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { build, obstacle, PARTS, run, share } from '../../scripts/simt.mjs';

// One seed, so that a change is what makes a difference; `npm run test:simt` draws others.
const SEED = '1';
const MINUTES = 60_000;
const why = obstacle();

/** Of a report's last line: what was compared, and what was wrong. */
function countsOf(output: string): { comparisons: number; failures: number; faults: number } | undefined {
  const found = /: (\d+) comparisons, (\d+) failures, (\d+) faults;/.exec(output);
  return found
    ? { comparisons: Number(found[1]), failures: Number(found[2]), faults: Number(found[3]) }
    : undefined;
}

describe.skipIf(why)(`CUDA kernels on the host${why ? `: ${why}` : ''}`, () => {
  let folder = '';
  const outputs = new Map<string, string>();

  beforeAll(async () => {
    folder = build();
    const jobs = PARTS.map((part) => async () => {
      outputs.set(part, (await run(join(folder, 'simt_check'), [part, SEED])).output);
    });
    await share(jobs, 2);
  }, 20 * MINUTES);

  it('sees what is wrong with kernels that are wrong on purpose', { timeout: 2 * MINUTES }, async () => {
    const { status, output } = await run(join(folder, 'simt_selftest'), []);
    expect(output).not.toContain('FAIL');
    expect(output.match(/^ok /gm)).toHaveLength(23);
    expect(status).toBe(0);
  });

  // The least that a part compares: fewer means that it ended early.
  it.each([
    ['ops', 'every op is what its CPU twin is', 1000],
    ['stages', 'the resident step is what the ops are', 70],
    [
      'many',
      'the resident step of 9 to 16 tokens is what the ops are, and has the bits of shorter steps',
      60,
    ],
    ['stretches', 'the resident step is the same bits in any stretches', 5],
    ['ranks', 'two ranks that sum inside the kernel, and a recorded step, give the same bits', 9],
    ['peers', 'the peer collective gives the tree, and a peer that never comes ends the kernel', 150],
  ])('%s: %s', (part, _what, least) => {
    const output = outputs.get(part) ?? '';
    const counts = countsOf(output);
    expect(counts, output).toMatchObject({ failures: 0, faults: 0 });
    expect(counts?.comparisons).toBeGreaterThanOrEqual(least);
  });
});
