// Started by what starts things on clusters: real Slurm daemons, real mpirun, torchrun's and LeaderWorkerSet's variables.

import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { root } from '../helpers/fixture.js';
import { Running, until } from '../helpers/running.js';
import { requireProgram, Slurm } from '../helpers/slurm.js';
import { tpRun } from '../helpers/tp-run.js';

const PROGRAM = [process.execPath, join(root, 'dist/cli/main.js')];
const WORDS = ['--device', 'cpu', '--threads', '1', '--prompt-ids', '2,17,5', '--max-tokens', '8'];
const folder = mkdtempSync(join(tmpdir(), 'tp-run-test-'));
const key = join(folder, 'key');

/** What one process without any launcher prints. */
let expected: string;
beforeAll(async () => {
  expected = (await tpRun(WORDS)).stdout;
  expect(expected).not.toBe('');
  await tpRun(['keygen', key]);
});
afterAll(() => {
  expect(readdirSync(folder).filter((name) => name.startsWith('tp-run-'))).toEqual([]);
  rmSync(folder, { recursive: true });
});

describe('Slurm', () => {
  let slurm: Slurm;
  beforeAll(async () => {
    slurm = await Slurm.start();
  });
  afterAll(() => slurm?.stop());

  it('starts a task per rank on one node, and each names its source of ranks', async () => {
    const { code, stdout, stderr } = await slurm.run(['srun', '-n', '2', ...PROGRAM, ...WORDS], {
      TMPDIR: folder,
    });
    expect(stderr).toContain('ranks from Slurm: node 0 of 2, one rank\n');
    expect(stderr).toContain('ranks from Slurm: node 1 of 2, one rank\n');
    expect(stderr).toContain('tp=2 cpu');
    expect([code, stdout]).toEqual([0, expected]);
  });

  it('starts one task that starts two ranks', async () => {
    const srun = ['srun', '-N', '1', '--ntasks', '1'];
    const { code, stdout, stderr } = await slurm.run([...srun, ...PROGRAM, ...WORDS, '--gpus', '2']);
    expect(stderr).toContain('ranks from Slurm: node 0 of 1\n');
    expect(stderr).toContain('tp=2 cpu');
    expect([code, stdout]).toEqual([0, expected]);
  });

  it('starts a task on each of two nodes from the batch script, with two ranks each and a key', async () => {
    const output = join(folder, 'job.log');
    const script = join(root, 'launch/slurm.sbatch');
    const sbatch = ['sbatch', '--wait', '--nodes=2', `--output=${output}`, `--chdir=${folder}`, script];
    const { code, stderr } = await slurm.run(
      [...sbatch, ...WORDS, '--gpus', '2', '--master-addr', slurm.hosts.address(0)],
      { TP_RUN: PROGRAM.join(' ') },
    );
    const log = existsSync(output) ? readFileSync(output, 'utf8') : stderr;
    expect(code, log).toBe(0);
    expect(log).toContain('ranks from Slurm: node 0 of 2\n');
    expect(log).toContain('ranks from Slurm: node 1 of 2\n');
    expect(log).toContain('tp=4 cpu');
    expect(log).toContain(expected);
    expect(readdirSync(folder).filter((name) => name.endsWith('.key'))).toEqual([]);
  });

  it('takes every task along when one rank of a step dies', async () => {
    const words = [
      '--device',
      'cpu',
      '--threads',
      '1',
      '--prompt-ids',
      '2',
      '--max-tokens',
      '4000',
      '--ignore-eos',
    ];
    const run = slurm.run(['srun', '-n', '2', ...PROGRAM, ...words], { TMPDIR: folder });
    const workers = () => pidsOf((line) => line.includes('main.js worker ') && line.includes(folder));
    await until(() => workers().length === 2, 20_000);
    process.kill(workers()[1]!, 'SIGKILL');
    const { code, stderr } = await run;
    expect(stderr).toMatch(/TP_WORKER_DIED: rank \d on n0: killed by SIGKILL/);
    expect(code).toBe(4);
    expect(workers()).toEqual([]);
  });
});

describe('Open MPI', () => {
  it('starts a task per rank, and each names its source of ranks', async () => {
    requireProgram('mpirun', 'openmpi-bin');
    const mpirun = ['mpirun', '--allow-run-as-root', '--oversubscribe', '-n', '2'];
    const { code, stdout, stderr } = await new Running(WORDS, { TMPDIR: folder }, mpirun).ended;
    expect(stderr).toContain('ranks from Open MPI: node 0 of 2, one rank');
    expect(stderr).toContain('ranks from Open MPI: node 1 of 2, one rank');
    expect(stderr).toContain('tp=2 cpu');
    expect([code, stdout]).toEqual([0, expected]);
  });
});

describe('torchrun’s variables', () => {
  const torch = (rank: number, env: Record<string, string> = {}) =>
    new Running(WORDS, {
      TMPDIR: folder,
      ...{ RANK: `${rank}`, WORLD_SIZE: '2', LOCAL_RANK: `${rank}`, LOCAL_WORLD_SIZE: '2' },
      ...{
        MASTER_ADDR: '127.0.0.1',
        MASTER_PORT: '29555',
        TORCHELASTIC_RUN_ID: `test-${process.pid}`,
        ...env,
      },
    });

  it('make two processes of one host two ranks', async () => {
    const [lead, other] = await Promise.all([torch(0).ended, torch(1).ended]);
    expect(lead.stderr).toContain('ranks from torchrun: node 0 of 2, one rank');
    expect(other.stderr).toContain('ranks from torchrun: node 1 of 2, one rank');
    expect(lead.stderr).toContain('tp=2 cpu');
    expect([lead.code, other.code, lead.stdout, other.stdout]).toEqual([0, 0, expected, '']);
  });

  it('make processes of two hosts two ranks, with a key', async () => {
    const env = {
      LOCAL_RANK: '0',
      LOCAL_WORLD_SIZE: '1',
      TP_RUN_KEY_FILE: key,
      MASTER_PORT: `${20_000 + (process.pid % 9000)}`,
    };
    const [lead, other] = await Promise.all([torch(0, env).ended, torch(1, env).ended]);
    expect(lead.stderr).toContain('tp=2 cpu');
    expect([lead.code, other.code, lead.stdout], lead.stderr).toEqual([0, 0, expected]);
  });

  it('leave no room for --gpus 2', async () => {
    const env = { RANK: '0', WORLD_SIZE: '2', LOCAL_RANK: '0', LOCAL_WORLD_SIZE: '2', MASTER_ADDR: 'x' };
    const { code, stderr } = await tpRun([...WORDS, '--gpus', '2'], env);
    expect(stderr).toContain(
      'TP_LAUNCHER: ranks from torchrun: it started a task for every rank, so --gpus 2 must be 1',
    );
    expect(code).toBe(2);
  });
});

describe('a LeaderWorkerSet’s variables', () => {
  it('make two pods two nodes', async () => {
    const port = `${20_000 + ((process.pid + 4500) % 9000)}`;
    const pods = [0, 1].map(
      (index) =>
        new Running([...WORDS, '--gpus', '2', '--master-port', port], {
          ...{ LWS_LEADER_ADDRESS: 'localhost', LWS_GROUP_SIZE: '2', LWS_WORKER_INDEX: `${index}` },
          TP_RUN_KEY: readFileSync(key, 'utf8').trim(),
        }),
    );
    const [lead, other] = await Promise.all(pods.map((pod) => pod.ended));
    expect(lead!.stderr).toContain('ranks from LeaderWorkerSet: node 0 of 2\n');
    expect(lead!.stderr).toContain('tp=4 cpu');
    expect([lead!.code, other!.code, lead!.stdout], other!.stderr).toEqual([0, 0, expected]);
  });
});

/** Processes whose command line is so. */
function pidsOf(matches: (line: string) => boolean): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .filter((pid) => {
      try {
        return matches(readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' '));
      } catch {
        return false;
      }
    })
    .map(Number);
}
