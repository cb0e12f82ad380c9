// The page that people read of one bench result.

/** Published for TP=2 on two H200 (vLLM PR #41379), ms a token, by batch size. */
const PUBLISHED = { 1: 2.82, 4: 3.28, 8: 3.65 };

export function markdown({ started, provenance, gpus, decode, allreduce, load, failed }, file) {
  const parts = [
    `# Bench of ${started.slice(0, 10)}\n\n${where(provenance, gpus)}\nRaw samples: \`${file}\`.\n`,
  ];
  if (decode.length) parts.push(byBatch(decode), byContext(decode));
  if (allreduce.length) parts.push(sums(allreduce));
  if (load.length) parts.push(loading(load));
  if (failed.length)
    parts.push(
      `## Failed\n\n${failed.map(({ name, error }) => `- ${name}: ${error.split('\n')[0]}\n`).join('')}`,
    );
  return parts.join('\n');
}

function where(provenance, gpus) {
  const commit = provenance
    ? `${provenance.commit ?? 'unknown'}${provenance.dirty ? ' with changes' : ''}`
    : 'unknown';
  const host = provenance
    ? `${provenance.cpu}, ${provenance.cores} cores, ${provenance.os}, Node ${provenance.node}, CUDA ${provenance.cuda ?? 'not compiled in'}`
    : 'host unknown';
  const devices = gpus
    ? `${gpus.devices.length} x ${gpus.devices[0].name}, driver ${gpus.driver ?? 'unknown'} (CUDA up to ${gpus.cuda ?? 'unknown'}), NCCL ${gpus.nccl ?? 'none'}`
    : 'no GPU';
  return `${devices}; ${host}; commit ${commit}.`;
}

const cell = (value, digits = 2) => (value === null || value === undefined ? '' : value.toFixed(digits));

function table(headings, rows) {
  const line = (cells) => `| ${cells.join(' | ')} |\n`;
  return line(headings) + line(headings.map(() => '--:')) + rows.map(line).join('');
}

const columnsOf = ({ tpot_ms, gb_per_s, share_of_bandwidth }) => [
  `${cell(tpot_ms.median)} (${cell(tpot_ms.p90)})`,
  cell(gb_per_s, 0),
  `${cell(share_of_bandwidth === null ? null : share_of_bandwidth * 100, 0)} %`,
];

function byBatch(decode) {
  const runs = firstOfEach(decode);
  const batches = [...new Set(runs.flatMap(({ rows }) => rows.map(({ batch }) => batch)))];
  const { model, dtype } = runs[0].run;
  const context = runs[0].rows[0].context;
  const published = model.endsWith('gemma-4-26b-a4b.json');
  const headings = runs.flatMap(({ run }) => [`TP=${run.tp}, median (p90)`, 'GB/s', 'of bandwidth']);
  return (
    `## Time per output token, ms\n\n${model}, ${dtype}, context ${context}, ${runs[0].rows[0].steps} steps; ` +
    `${runs.map(({ run }) => `TP=${run.tp}: ${run.collective_why}`).join('; ')}.\n\n` +
    table(
      ['batch', ...headings, ...(published ? ['vLLM PR #41379, TP=2, 2 x H200'] : [])],
      batches.map((batch) => [
        `${batch}`,
        ...runs.flatMap(({ rows }) => {
          const row = rows.find((one) => one.batch === batch);
          return row ? columnsOf(row) : ['', '', ''];
        }),
        ...(published ? [cell(PUBLISHED[batch])] : []),
      ]),
    )
  );
}

/** The run over all batch sizes of each TP degree. */
function firstOfEach(decode) {
  return decode.filter(({ run }, i) => decode.findIndex((other) => other.run.tp === run.tp) === i);
}

function byContext(decode) {
  const degrees = firstOfEach(decode).map(({ run }) => run.tp);
  const ofDegree = (tp) => decode.filter(({ run }) => run.tp === tp).map(({ rows }) => rows[0]);
  const contexts = [...new Set(decode.map(({ rows }) => rows[0].context))];
  return (
    '## Over context, batch 1, ms\n\n' +
    table(
      ['context', ...degrees.flatMap((tp) => [`TP=${tp}, median (p90)`, 'prompt, ms'])],
      contexts.map((context) => [
        `${context}`,
        ...degrees.flatMap((tp) => {
          const row = ofDegree(tp).find((one) => one.context === context);
          return row ? [columnsOf(row)[0], cell(row.prefill_ms, 0)] : ['', ''];
        }),
      ]),
    )
  );
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
  const headings = [
    'collective',
    'launched',
    'bytes',
    'median us',
    'p10',
    'p90',
    'p99',
    'algbw GB/s',
    '#wrong',
  ];
  return `## All-reduce, ${allreduce[0].run.tp} ranks\n\n${table(headings, rows)}`;
}

function loading(load) {
  const rows = load.map(({ tp, what, load_s, stage_ms, weight_bytes }) => {
    const gb = weight_bytes.reduce((sum, bytes) => sum + bytes, 0) / 1e9;
    const weights = stage_ms.weights / 1000;
    const others = Object.entries(stage_ms)
      .filter(([stage]) => stage !== 'weights')
      .map(([stage, ms]) => `${stage} ${(ms / 1000).toFixed(2)}`);
    return [
      what,
      `${tp}`,
      cell(load_s),
      cell(gb, 1),
      cell(weights),
      cell(gb / weights, 1),
      others.join(', '),
    ];
  });
  const headings = ['weights', 'TP', 'ready after s', 'GB', 'weights s', 'GB/s', 'other stages, s'];
  return `## From the command to the first step\n\n${table(headings, rows)}`;
}
