// Things that go wrong with GPUs. Each must end within a bounded time with the designed exit code, leave no worker
// behind, and leave the GPUs fit for the next run.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { good, isAlive, must, REAL_WIDTH, Running, run, sleep } from './harness.mjs';

/** Memory in use is given back a moment after its process has gone; and time for a loaded host. */
const END_S = 5;

/** Goes on for a while if nothing happens to it. `model`: a file of configs/. */
function longRun(on, model) {
  const { config } = JSON.parse(readFileSync(model, 'utf8'));
  const tokens = Math.min(50_000, config.max_position_embeddings - 3);
  return [...on, '--model', model, '--prompt-ids', '2,17,5', '--max-tokens', `${tokens}`, '--ignore-eos'];
}

/** Kills one of `ranks` workers while they decode; the seconds that the rest then takes to end as it should. */
export async function killInMidDecode(on, model, ranks, victim) {
  const long = new Running(longRun(on, model), { limitS: 120 });
  const workers = await long.spawned(ranks);
  await long.decoding();
  await sleep(200 * Math.random());
  const at = performance.now();
  process.kill(workers[victim], 'SIGKILL');
  const ended = await long.ended;
  const took = (performance.now() - at) / 1000;
  const words = `^TP_WORKER_DIED: rank ${victim} on \\S+: killed by SIGKILL in generate`;
  expectEnd(ended, 4, new RegExp(words, 'm'));
  must(took < END_S, `it took ${took.toFixed(1)} s to end`);
  await gone(workers);
  return took;
}

export async function faults(suite, gpus) {
  const ranks = gpus.count;
  const all = ['--gpus', gpus.flag(ranks), '--device', 'cuda'];
  const LONG = longRun(all, REAL_WIDTH);
  const SHORT = [...all, '--prompt-ids', '2,17,5', '--max-tokens', '32', '--ignore-eos'];
  const last = ranks - 1;
  const reference = await good([...SHORT, '--json']).then(tokensOf, (error) => error);

  /** The GPUs work, and give the tokens that they gave before. */
  const works = async (collective = 'auto', env = {}) => {
    if (reference instanceof Error) throw reference;
    const result = await good([...SHORT, '--collective', collective, '--json'], { env, limitS: 120 });
    must(tokensOf(result) === reference, `other tokens than before: ${tokensOf(result)}`);
    return result;
  };

  for (const collective of gpus.collectives) {
    for (const victim of new Set([0, last])) {
      await suite.test(
        `faults: kill -9 of rank ${victim} of ${ranks} in mid-decode, ${collective}`,
        async () => {
          const took = await killInMidDecode([...all, '--collective', collective], REAL_WIDTH, ranks, victim);
          await works(collective);
          return `over after ${took.toFixed(2)} s, and the next run works`;
        },
      );
    }

    await suite.test(`faults: a rank that stops in mid-decode, ${collective}`, async () => {
      const long = new Running([...LONG, '--collective', collective, '--step-timeout', '2'], { limitS: 120 });
      const workers = await long.spawned(ranks);
      await long.decoding();
      const at = performance.now();
      process.kill(workers[last], 'SIGSTOP');
      const ended = await long.ended;
      const took = (performance.now() - at) / 1000;
      expectEnd(ended, 4, new RegExp(`^TP_STEP_TIMEOUT: rank ${last} on \\S+`, 'm'));
      must(took < 2 + END_S, `it took ${took.toFixed(1)} s to end`); // its partner's kernels do not spin on
      await gone(workers);
      await works(collective);
      return `over after ${took.toFixed(2)} s with a step time-out of 2 s, and the next run works`;
    });

    await suite.test(`faults: a rank that never arrives, ${collective}`, async () => {
      const start = new Running([...LONG, '--collective', collective, '--init-timeout', '5'], {
        limitS: 120,
      });
      const workers = await start.spawned(ranks);
      const at = performance.now();
      process.kill(workers[last], 'SIGSTOP');
      const ended = await start.ended;
      const took = (performance.now() - at) / 1000;
      expectEnd(
        ended,
        4,
        new RegExp(`^TP_STAGE_TIMEOUT: rank ${last} on \\S+ did not get past stage \\w+ within 5000 ms`, 'm'),
      );
      must(took < 5 + 2 * END_S, `it took ${took.toFixed(1)} s to end`);
      await gone(workers);
      await works(collective);
      return `over after ${took.toFixed(2)} s with a start-up time-out of 5 s, and the next run works`;
    });
  }

  await suite.test('faults: a GPU that is already full', async () => {
    const hog = spawn(
      process.execPath,
      [join(dirname(fileURLToPath(import.meta.url)), 'hog.mjs'), '0', '3000000000'],
      {
        stdio: ['ignore', 'pipe', 'inherit'],
      },
    );
    try {
      const [said] = await Promise.race([
        once(hog.stdout, 'data'),
        once(hog, 'exit').then(() => ['the process that fills the GPU ended']),
        // without a hold on the process, which is to end when all is done
        setTimeout(120_000, ['the GPU was not full within 120 s'], { ref: false }),
      ]);
      must(/^full: /.test(String(said)), String(said));
      const ended = await run([...LONG], { limitS: 120 });
      expectEnd(ended, 2, /TP_MEMORY: asked for [\d.]+ GB on GPU 0, [\d.]+ of [\d.]+ GB are free/);
    } finally {
      const end = hog.exitCode === null ? once(hog, 'exit') : null;
      hog.kill('SIGKILL');
      await end;
    }
    await works();
    return 'asked and free bytes are named, and the next run works';
  });

  await suite.test('faults: Ctrl-C in mid-decode', async () => {
    const long = new Running(LONG, { limitS: 120 });
    const workers = await long.spawned(ranks);
    await long.decoding();
    const at = performance.now();
    long.child.kill('SIGINT');
    const ended = await long.ended;
    const took = (performance.now() - at) / 1000;
    expectEnd(ended, 130, /TP_INTERRUPTED: stopped by SIGINT/);
    must(took < END_S, `it took ${took.toFixed(1)} s to end`);
    await gone(workers);
    await works();
    return `over after ${took.toFixed(2)} s, and the next run works`;
  });

  if (!gpus.collectives.includes('nccl')) {
    for (const name of ['no NCCL library', 'P2P switched off by environment'])
      suite.leaveOut(`faults: ${name}`, 'ranks share a card, which NCCL refuses');
    return;
  }
  await suite.test('faults: no NCCL library', async () => {
    // the linker looks there first, and what it finds is no library
    const folder = mkdtempSync(join(tmpdir(), 'tp-run-gpu-'));
    try {
      writeFileSync(join(folder, 'libnccl.so.2'), '');
      const env = { LD_LIBRARY_PATH: folder };
      const ended = await run([...SHORT, '--collective', 'nccl'], { env, limitS: 60 });
      expectEnd(
        ended,
        2,
        /^TP_COLLECTIVE_UNSUPPORTED: collective nccl cannot be used here: .*libnccl\.so\.2/m,
      );
      const { run: facts } = await works('auto', env);
      return `auto takes ${facts.collective_why}`;
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  await suite.test('faults: P2P switched off by environment', async () => {
    const env = { NCCL_P2P_DISABLE: '1' };
    const ended = await run([...SHORT, '--collective', 'peer'], { env, limitS: 60 });
    expectEnd(
      ended,
      2,
      /^TP_COLLECTIVE_UNSUPPORTED: collective peer cannot be used here: NCCL_P2P_DISABLE=1/m,
    );
    const { run: facts } = await works('auto', env);
    must(facts.collective === 'nccl', `auto took ${facts.collective_why}`);
    return `auto takes ${facts.collective_why}`;
  });
}

const tokensOf = ({ results }) => results.map(({ token_ids }) => token_ids.join()).join(';');

function expectEnd({ code, signal, late, stderr }, expected, words) {
  must(!late, `not over after ${late} s\n${stderr}`);
  must(code === expected, `ended with ${code ?? signal}, not ${expected}\n${stderr}`);
  must(words.test(stderr), `said nothing like ${words}\n${stderr}`);
}

async function gone(workers) {
  const start = performance.now();
  while (workers.some(isAlive)) {
    must(performance.now() - start < 2000, `workers ${workers.filter(isAlive).join(', ')} still run`);
    await sleep(10);
  }
}
