// Real processes around one collective: what every rank gets when all make the same call.

import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { root } from './fixture.js';

export interface Order {
  op: 'allReduce' | 'gather';
  send: Float32Array;
  /** Before the call. */
  delayMs?: number;
  /** The collective's time-out from here on. */
  limitMs?: number;
}

export interface Answer {
  result?: Float32Array;
  error?: { code: string; text: string };
}

export class RankGroup {
  readonly ranks: readonly ChildProcess[];
  readonly #folder = mkdtempSync(join(tmpdir(), 'tp-run-test-'));

  private constructor(name: string, ranks: number) {
    const script = join(root, 'test/helpers/collective-rank.mjs');
    this.ranks = Array.from({ length: ranks }, (_, rank) =>
      fork(script, [name, this.#folder, String(rank), String(ranks)], { serialization: 'advanced' }),
    );
  }

  static async start(name: string, ranks: number): Promise<RankGroup> {
    const group = new RankGroup(name, ranks);
    await Promise.all(group.ranks.map((rank) => once(rank, 'message')));
    return group;
  }

  /** What every rank answers, by rank. A rank whose order is null is left alone and answers {}. */
  settle(orders: readonly (Order | null)[]): Promise<Answer[]> {
    return Promise.all(
      this.ranks.map(async (rank, i) => {
        const order = orders[i];
        if (!order) return {};
        const answer = once(rank, 'message');
        rank.send({ delayMs: 0, ...order });
        return (await answer)[0] as Answer;
      }),
    );
  }

  /** The ranks' results; throws the first error. */
  async run(orders: readonly Order[]): Promise<Float32Array[]> {
    const answers = await this.settle(orders);
    const failed = answers.find(({ error }) => error)?.error;
    if (failed) throw new Error(`${failed.code}: ${failed.text}`);
    return answers.map(({ result }) => result!);
  }

  async stop(): Promise<void> {
    await Promise.all(
      this.ranks.map(async (rank) => {
        if (rank.exitCode !== null || rank.signalCode !== null) return;
        const gone = once(rank, 'exit');
        rank.kill('SIGKILL');
        await gone;
      }),
    );
    rmSync(this.#folder, { recursive: true });
  }
}
