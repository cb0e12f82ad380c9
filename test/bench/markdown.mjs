// The page that people read of one bench result.

import { basename } from 'node:path';
import { stageCells } from '../../dist/report/stages.js';

/** Published for TP=2 on two H200 (vLLM PR #41379), ms a token, by batch size. */
const PUBLISHED = { 1: 2.82, 4: 3.28, 8: 3.65 };

export function markdown(result, file) {
  const sections = [
    [result.decode, byBatch],
    [result.context, byContext],
    [result.stages, stages],
    [result.stages, expertsInAStep],
    [result.moe, experts],
    [result.allreduce, sums],
    [result.load, loading],
    [result.checks, sameBits],
    [result.kill, kills],
    [result.failed, failures],
    [result.left_out, leftOut],
  ];
  return [
    `# Bench of ${result.started.slice(0, 10)}\n\n${where(result)}\nRaw samples: \`${file}\`.\n`,
    ...sections.flatMap(([list, section]) => (list.length > 0 ? [section(list, result)] : [])),
  ].join('\n');
}

function where({ provenance, gpus, command }) {
  const { cpu, cores, os, node, cuda } = provenance;
  const commit = `${provenance.commit ?? 'unknown'}${provenance.dirty ? ' with changes' : ''}`;
  const devices = gpus
    ? `${gpus.devices.length} x ${gpus.devices[0].name}, driver ${gpus.driver ?? 'unknown'} (CUDA up to ${gpus.cuda ?? 'unknown'}), NCCL ${gpus.nccl ?? 'none'}`
    : 'no GPU';
  return (
    `${devices}; ${cpu}, ${cores} cores, ${os}, Node ${node}, CUDA ${cuda ?? 'not compiled in'}; commit ${commit}; ` +
    `\`${['npm run bench --', ...command].join(' ')}\`.`
  );
}

const cell = (value, digits = 2) => (value === null || value === undefined ? '' : value.toFixed(digits));
const share = (part) => (part === null || part === undefined ? '' : `${cell(part * 100, 0)} %`);
const byDegree = (runs) => runs.toSorted((a, b) => a.run.tp - b.run.tp);

function table(headings, rows) {
  const line = (cells) => `| ${cells.join(' | ')} |\n`;
  return line(headings) + line(headings.map(() => '--:')) + rows.map(line).join('');
}

/** Ms that reading a step's bytes must take at what a plain read reaches on the same devices. */
const floorOf = ({ read_bandwidth_gb_per_s }, { read_gb }) => (read_gb * 1000) / read_bandwidth_gb_per_s;

/** Of a step, as the timed steps of the same shape have it; waiting for other ranks included. */
function sumsShare({ run }, { batch }, stages) {
  const timed = stages.find((other) => other.run.tp === run.tp)?.rows.find((row) => row.batch === batch);
  return timed ? share(timed.stages.sync_us / timed.stages.step_us) : '';
}

function byBatch(decode, { stages }) {
  const runs = byDegree(decode);
  const { model, dtype } = runs[0].run;
  const { context, steps } = runs[0].rows[0];
  const published = model.endsWith('gemma-4-26b-a4b.json');
  const columns = ['median', 'p10', 'p90', 'floor', 'x floor', 'GB/s', 'of bandwidth', 'sums'];
  const rows = runs.flatMap((bench) =>
    bench.rows.map((row) => {
      const { median, p10, p90 } = row.tpot_ms;
      const floor = floorOf(bench, row);
      return [
        ...[`${bench.run.tp}`, `${row.batch}`],
        ...[median, p10, p90, floor, median / floor].map((x) => cell(x)),
        ...[cell(row.gb_per_s, 0), share(row.share_of_bandwidth), sumsShare(bench, row, stages)],
        ...(published ? [bench.run.tp === 2 ? cell(PUBLISHED[row.batch]) : ''] : []),
      ];
    }),
  );
  return (
    `## Time per output token, ms\n\n${basename(model)}, ${dtype}, context ${context}, ${steps} steps; ` +
    `${runs.map(({ run }) => `TP=${run.tp}: ${run.collective_why}`).join('; ')}. ` +
    `The floor reads the step's bytes as fast as a plain read does: ${runs.map(({ run, read_bandwidth_gb_per_s: rate }) => `${cell(rate, 0)} GB/s at TP=${run.tp}`).join(', ')}.\n\n` +
    table(['TP', 'batch', ...columns, ...(published ? ['vLLM PR #41379, 2 x H200'] : [])], rows)
  );
}

function byContext(contexts) {
  const runs = byDegree(contexts);
  const cells = runs.flatMap(({ run, rows }) => rows.map((row) => ({ tp: run.tp, ...row })));
  const columns = [...new Set(cells.map(({ tp, batch }) => `TP=${tp}, batch ${batch}`))];
  const lengths = [...new Set(cells.map(({ context }) => context))];
  return (
    '## Over context, ms, median (p90)\n\nPositions before the measured ones hold made-up keys and values but for the last ' +
    'chunk of the prompt.\n\n' +
    table(
      ['context', ...columns],
      lengths.map((length) => [
        `${length}`,
        ...columns.map((column) => {
          const one = cells.find(
            ({ tp, batch, context }) => context === length && `TP=${tp}, batch ${batch}` === column,
          );
          return one ? `${cell(one.tpot_ms.median)} (${cell(one.tpot_ms.p90)})` : '';
        }),
      ]),
    )
  );
}

/** Of the first batch size and of 8; the raw samples have all. */
function stages(runs) {
  const one = ({ run }, { batch, context, tpot_ms, stages: report }) => {
    const { headings, rows } = stageCells(report, tpot_ms.median * 1000);
    return (
      `### TP=${run.tp}, batch ${batch}, context ${context}\n\n` +
      `Sums between ranks, waiting included: ${cell(report.sync_us, 1)} us, ${share(report.sync_us / report.step_us)} of the step.\n\n` +
      table(headings, rows)
    );
  };
  const parts = byDegree(runs).flatMap((bench) =>
    bench.rows.filter(({ batch }, i) => i === 0 || batch === 8).map((row) => one(bench, row)),
  );
  return `## Where a step goes, on one rank\n\n${parts.join('\n')}`;
}

/** A layer's experts as a step runs them; a stage's time contains its way from the stage before. */
function expertsInAStep(runs) {
  const rows = byDegree(runs).flatMap(({ run, rows }) =>
    rows.flatMap(({ batch, stages: { rows: all } }) => {
      const sum = (of, ...names) =>
        all.filter(({ stage }) => names.includes(stage)).reduce((total, row) => total + of(row), 0);
      const layers = sum(({ calls }) => calls, 'gateUp');
      if (layers === 0) return [];
      const us = ({ us_per_token }) => us_per_token / layers;
      const both = sum(us, 'gateUp', 'down');
      const mb = sum(({ read_bytes }) => read_bytes / layers / 1e6, 'gateUp', 'down');
      const figures = [both, sum(us, 'gateUp'), sum(us, 'down'), mb].map((x) => cell(x, 1));
      return [[`${run.tp}`, `${batch}`, ...figures, cell((mb / both) * 1e3, 0)]];
    }),
  );
  const headings = ['TP', 'batch', 'us a layer', 'gate_up', 'down', 'MB', 'GB/s'];
  return `## The experts within a step\n\nWith the dense MLP, which the same stages take.\n\n${table(headings, rows)}`;
}

function experts(runs, { gpus, decode }) {
  // a long read of one card, or the doctor's short one
  const one = decode.find(({ run }) => run.tp === 1);
  const rate = one?.read_bandwidth_gb_per_s ?? gpus.devices[0].read_gb_per_s;
  const rows = runs.flatMap(({ tp, rows }) =>
    rows.map(({ tokens, variant, time_us: { median, p90 }, read_mb, gb_per_s }) => {
      const floor = (read_mb * 1000) / rate;
      return [
        ...[`${tp}`, `${tokens}`, variant],
        ...[median, p90, floor, median / floor].map((x) => cell(x)),
        cell(gb_per_s, 0),
      ];
    }),
  );
  const headings = ['TP', 'tokens', 'kernels', 'median us', 'p90', 'floor', 'x floor', 'GB/s'];
  return `## The experts of one layer alone\n\nThe floor reads their weights at ${cell(rate, 0)} GB/s.\n\n${table(headings, rows)}`;
}

function sums(allreduce) {
  const rows = allreduce.flatMap(({ rows, run }) =>
    rows.map((row) => [
      run.collective,
      { host: 'host', stream: 'one by one', graph: 'CUDA graph' }[row.launch],
      `${row.bytes}`,
      ...[row.time_us.median, row.time_us.p10, row.time_us.p90, row.time_us.p99].map((us) => cell(us)),
      cell(row.algbw_gb_per_s, 3),
      `${row.wrong}`,
    ]),
  );
  const times = ['median us', 'p10', 'p90', 'p99'];
  const headings = ['collective', 'launched', 'bytes', ...times, 'algbw GB/s', '#wrong'];
  return `## All-reduce, ${allreduce[0].run.tp} ranks\n\n${table(headings, rows)}`;
}

function loading(load) {
  const rows = load.map(({ tp, what, load_s, stage_ms, weight_bytes }) => {
    const gb = weight_bytes.reduce((sum, bytes) => sum + bytes, 0) / 1e9;
    const weights = stage_ms.weights / 1000;
    const others = Object.entries(stage_ms)
      .filter(([stage]) => stage !== 'weights')
      .map(([stage, ms]) => `${stage} ${(ms / 1000).toFixed(2)}`);
    const figures = [cell(load_s), cell(gb, 1), cell(weights), cell(gb / weights, 1)];
    return [what, `${tp}`, ...figures, others.join(', ')];
  });
  const headings = ['weights', 'TP', 'ready after s', 'GB', 'weights s', 'GB/s', 'other stages, s'];
  return `## From the command to the first step\n\n${table(headings, rows)}`;
}

const list = (lines) => lines.map((line) => `- ${line}\n`).join('');

function sameBits(checks) {
  return `## The same bits\n\n${list(checks.map(({ tp, collective, line }) => `TP=${tp}, ${collective}: ${line}`))}`;
}

function kills(killed) {
  const line = ({ ranks, victim, seconds }) =>
    `kill -9 of rank ${victim} of ${ranks} in mid-decode: over after ${cell(seconds)} s with exit code 4, no worker left`;
  return `## A rank that dies\n\n${list(killed.map(line))}`;
}

function failures(failed) {
  return `## Failed\n\n${list(failed.map(({ name, error }) => `${name}: ${error.split('\n')[0]}`))}`;
}

function leftOut(names) {
  return `## Left out by --only\n\n${names.join(', ')}\n`;
}
