// The words of `tp-run check`: its verdict, what differs, and the matrix of what was laid beside what.

import type { AxisResult, CheckResult } from './schema.js';
import { counted, grouped, table } from './table.js';

type Judged = Pick<CheckResult, 'verdict' | 'level' | 'prompts' | 'max_tokens' | 'axes' | 'control'>;

/** The first line of the answer. */
export function verdictLine(check: Judged & { tp: number }): string {
  const claim = check.tp > 1 ? `tp=${check.tp} %s tp=1` : 'tp=1 %s itself over batch and repetition';
  if (check.verdict === 'pass') {
    return `PASS ${claim.replace('%s', 'is bit-identical to')}: ${scope(check)}, 0 differing [${controlWords(check)}]`;
  }
  if (check.verdict === 'control-missed') {
    const { planted, found } = check.control!;
    const instead = found ? `, but a difference at ${place(found)}` : '';
    return `CONTROL MISSED: the fault planted at ${place(planted)} was not found${instead}; nothing is proved`;
  }
  const axis = check.axes.find(({ equal }) => !equal)!;
  if (axis.disagreement) return `FAIL ${axis.name}: ${axis.disagreement}`;
  const prompts = `${axis.differing.sequences}/${check.prompts} prompts`;
  const [left] = claim.split(' %s ');
  const what =
    axis.axis === 'tp' ? `${left} differs from tp=1` : `${left} differs (${axis.axis}: ${axis.name})`;
  return `FAIL ${what} in ${prompts}; first at ${place(axis.first!)}`;
}

/** The lines below the verdict: how far apart, and the matrix. */
export function details(check: Judged): string {
  const distances = check.axes.flatMap(({ name, distance }) =>
    distance
      ? [
          `${name}: logits max|delta| ${distance.maxDelta?.toExponential(1) ?? 'infinite'} ` +
            `(${grouped(distance.maxUlp)} ULP), top-1 flips ${distance.topFlips}\n`,
        ]
      : [],
  );
  const rows = check.axes.map((axis) => [
    axis.axis,
    axis.name,
    grouped(axis.compared.tokens),
    grouped(axis.compared.rows),
    grouped(axis.compared.outputs),
    result(axis),
  ]);
  const { control } = check;
  if (control) {
    const found = control.detected
      ? 'found there'
      : control.found
        ? `found at ${place(control.found)}`
        : 'not found';
    rows.push(['control', `one ULP at ${place(control.planted)}`, '', '', '', found]);
  }
  return (
    distances.join('') + table(['axis', 'runs', 'tokens', 'logit rows', 'stage outputs', 'result'], rows)
  );
}

function scope({ axes, prompts, max_tokens, level }: Judged): string {
  const { tokens, rows, values } = axes[0]!.compared;
  const work = `${counted(prompts, 'prompt')} x ${counted(max_tokens, 'token')}`;
  if (level === 'tokens') return `${work}, ${counted(tokens, 'sampled token')}`;
  return `${work}, ${counted(rows, 'logit row')}, ${counted(values, 'value')}`;
}

function controlWords({ control }: Judged): string {
  return `control: detected at layer ${control!.planted.layer} ${control!.planted.stage}`;
}

function result({ equal, first, disagreement }: AxisResult): string {
  if (equal) return 'equal';
  return disagreement ? 'ranks disagree' : `differs at ${place(first!)}`;
}

/** "sequence 3, position 17, layer 5 attention" */
function place(at: { sequence: number; position: number; layer: number; stage: string }): string {
  const layer = at.layer < 0 ? at.stage : `layer ${at.layer} ${at.stage}`;
  return `sequence ${at.sequence}, position ${at.position}, ${layer}`;
}
