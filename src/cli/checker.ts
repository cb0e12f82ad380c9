// The comparisons of one check: each axis does the base's work in another way and must give the base's bits.

import type { OnStep } from '../engine/execution.js';
import type { PlantedFault } from '../engine/job.js';
import type { Run } from '../engine/launcher.js';
import { TpError } from '../errors.js';
import type { AxisResult, CheckResult } from '../report/schema.js';
import { Comparer, type Level } from './compare.js';
import { Transcript } from './transcript.js';

/** The ranks of a run did not even agree with each other; the axis that met it is recorded. */
export class RanksDisagree extends Error {}

type Axis = Pick<AxisResult, 'axis' | 'name'>;

/** A fault to plant. `rank` null: the last one, or every rank where all of them hold the stage's whole output. */
export interface PlannedFault extends Omit<PlantedFault, 'rank'> {
  rank: number | null;
}

export class Checker {
  readonly axes: AxisResult[] = [];
  control: CheckResult['control'] = null;
  readonly #level: Level;
  readonly #prompts: readonly number[][];
  readonly #maxTokens: number;
  readonly #ranks: number;
  readonly #base = new Transcript();

  constructor(level: Level, prompts: readonly number[][], maxTokens: number, ranks: number) {
    this.#level = level;
    this.#prompts = prompts;
    this.#maxTokens = maxTokens;
    this.#ranks = ranks;
  }

  /** Every prompt, decoded together, in order. */
  async makeBase(run: Run): Promise<void> {
    await this.#decode(run, this.#all, null, (step) => this.#base.add(step));
  }

  async compareTp(run: Run, fault: PlannedFault | null): Promise<void> {
    await this.#compare(run, { axis: 'tp', name: `tp=${this.#ranks} against tp=1` }, [this.#all], fault);
  }

  async compareBatches(run: Run): Promise<void> {
    const alone = this.#all.map((sequence) => [sequence]);
    await this.#compare(run, { axis: 'batch', name: 'each prompt alone' }, alone, null);
    const other = [this.#all.reverse()];
    if (alone.length > 1) await this.#compare(run, { axis: 'batch', name: 'other places' }, other, null);
  }

  async compareRepeat(run: Run, number: number, fault: PlannedFault | null): Promise<void> {
    await this.#compare(run, { axis: 'repeat', name: `fresh run ${number}` }, [this.#all], fault);
  }

  /** Plants a fault and looks for it with the same eyes as the axes, at the deepest level. */
  async runControl(run: Run, planned: PlannedFault): Promise<void> {
    const fault = this.#place(planned);
    const comparer = new Comparer(this.#base, 'layers', new Set([fault.sequence]));
    await this.#decode(run, [fault.sequence], fault, (step) => comparer.add(step));
    const { first } = comparer.finish();
    const { sequence, position, layer, stage, rank } = fault;
    const detected =
      first !== null &&
      first.sequence === sequence &&
      first.position === position &&
      first.layer === layer &&
      first.stage === stage;
    this.control = { planted: { sequence, position, layer, stage, rank }, found: first, detected };
  }

  get #all(): number[] {
    return [...this.#prompts.keys()];
  }

  /** Runs `batches` one after another; together they cover each prompt once. */
  async #compare(run: Run, axis: Axis, batches: number[][], planned: PlannedFault | null): Promise<void> {
    const fault = planned && this.#place(planned);
    const comparer = new Comparer(this.#base, this.#level, new Set(batches.flat()));
    let disagreement: string | null = null;
    try {
      for (const batch of batches) await this.#decode(run, batch, fault, (step) => comparer.add(step));
    } catch (error) {
      if (!(error instanceof TpError) || error.code !== 'TP_RANKS_DISAGREE') throw error;
      disagreement = error.text;
    }
    const comparison = comparer.finish();
    this.axes.push({
      ...axis,
      equal: !disagreement && comparison.first === null,
      ...comparison,
      disagreement,
    });
    if (disagreement) throw new RanksDisagree(disagreement);
  }

  #place(fault: PlannedFault): PlantedFault {
    const { layer, stage } = fault;
    const column = this.#base.columns.find((c) => c.layer === layer && c.stage === stage);
    return { ...fault, rank: fault.rank ?? (column?.sharded ? this.#ranks - 1 : -1) };
  }

  async #decode(run: Run, sequences: number[], fault: PlantedFault | null, onStep: OnStep): Promise<void> {
    await run.execute(
      {
        kind: 'generate',
        sequences: sequences.map((sequence) => ({
          promptIds: this.#prompts[sequence]!,
          maxTokens: this.#maxTokens,
          sequence,
        })),
        sampling: { temperature: 0, topK: 0, topP: 1, seed: 0 },
        stopTokenIds: [],
        keepLogits: this.#level !== 'tokens',
        fault,
      },
      onStep,
    );
  }
}
