// A few seconds of every fuzzer, from the kept corpus on: `npm run fuzz -- TARGET --seconds 600` is the long way.

import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, it } from 'vitest';
import { root } from '../helpers/fixture.js';

it.each(['safetensors', 'messages', 'hostlist', 'control'])(
  '%s: nothing breaks within four seconds',
  async (target) => {
    const words = [join(root, 'scripts/fuzz.mjs'), target, '--seconds', '4'];
    const { stdout } = await promisify(execFile)(process.execPath, words);
    const [, cases] = /: (\d+) cases in .* none broke anything/.exec(stdout) ?? [];
    expect(Number(cases), stdout).toBeGreaterThan(1000);
  },
);
