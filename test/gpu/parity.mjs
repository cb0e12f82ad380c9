// Our numbers beside those of another implementation of the model, prompt by prompt: how far apart they are, and whether
// that is near enough.

/** Of float32 logits: the other's sums run in another order. */
export const BOUND = 5e-3;

/**
 * float32 beside float32. `ours` and `theirs`: for every prompt `logits` [T, vocab] and `routes` [layers, T, K].
 */
export function compareExact(ours, theirs, topK) {
  const deltas = [];
  const routes = { compared: 0, differing: 0 };
  for (const [i, { logits, routes: chosen }] of ours.entries()) {
    requireEqual(`prompt ${i}: logits`, logits.length, theirs[i].logits.length);
    requireEqual(`prompt ${i}: routes`, chosen.length, theirs[i].routes.length);
    deltas.push(maxDelta(logits, theirs[i].logits));
    for (let at = 0; at < chosen.length; at += topK) {
      const set = (from) =>
        Array.from(from.subarray(at, at + topK))
          .sort((a, b) => a - b)
          .join();
      routes.compared++;
      if (set(chosen) !== set(theirs[i].routes)) routes.differing++;
    }
  }
  const worst = Math.max(...deltas);
  return { max_delta: worst, routes, equal: worst <= BOUND && routes.differing === 0 };
}

/** Largest difference of two lists of one length; NaN where either holds one. */
export function maxDelta(a, b) {
  let worst = 0;
  for (let i = 0; i < a.length; i++) {
    const delta = Math.abs(a[i] - b[i]);
    if (Number.isNaN(delta)) return delta;
    if (delta > worst) worst = delta;
  }
  return worst;
}

/**
 * bfloat16 of ours and of theirs, each beside their float32: [T, vocab] logits of every prompt. Both round, each in its own
 * places, so rows differ by chance: ours are no further while what they are further by is within two standard errors.
 */
export function compareRounded(ours, theirs, exact, vocab) {
  const [own, other] = [distances(ours, exact, vocab), distances(theirs, exact, vocab)];
  const further = own.map(({ kl }, row) => kl - other[row].kl);
  const misses = own.map(({ agrees }, row) => Number(other[row].agrees) - Number(agrees));
  return {
    ours: summary(own),
    theirs: summary(other),
    kl_further: { mean: mean(further), standard_error: standardError(further) },
    no_further: [further, misses].every((rows) => mean(rows) <= 2 * standardError(rows)),
  };
}

/** Of every row: KL divergence of `rounded` from `exact`, and whether both prefer the same token. */
function distances(rounded, exact, vocab) {
  return rounded.flatMap((logits, i) => {
    requireEqual(`prompt ${i}: logits`, logits.length, exact[i].length);
    return Array.from({ length: logits.length / vocab }, (_, row) => {
      const [p, q] = [exact[i], logits].map((all) => all.subarray(row * vocab, (row + 1) * vocab));
      return { kl: divergence(p, q), agrees: top(p) === top(q) };
    });
  });
}

function summary(rows) {
  const kl = rows.map((row) => row.kl);
  const agreement = mean(rows.map(({ agrees }) => Number(agrees)));
  return { rows: rows.length, kl_mean: mean(kl), kl_max: Math.max(...kl), agreement };
}

const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;

/** Of the mean. */
function standardError(values) {
  const middle = mean(values);
  return Math.sqrt(mean(values.map((x) => (x - middle) ** 2)) / (values.length - 1));
}

/** Of softmax(q) from softmax(p), in nats. */
function divergence(p, q) {
  const [logP, logQ] = [logSum(p), logSum(q)];
  let sum = 0;
  for (let i = 0; i < p.length; i++) {
    const log = p[i] - logP;
    sum += Math.exp(log) * (log - (q[i] - logQ));
  }
  return sum;
}

function logSum(logits) {
  const most = logits[top(logits)];
  let sum = 0;
  for (const x of logits) sum += Math.exp(x - most);
  return most + Math.log(sum);
}

function top(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}

function requireEqual(what, ours, theirs) {
  if (ours !== theirs) throw new Error(`${what}: ${ours} of ours, ${theirs} of theirs`);
}

/** What people read of both comparisons. */
export function verdicts({ exact, rounded }) {
  const { ours, theirs, kl_further } = rounded;
  const of = ({ kl_mean, agreement }) =>
    `KL ${kl_mean.toExponential(2)}, top-1 ${(agreement * 100).toFixed(1)} %`;
  return [
    `${exact.equal ? 'PASS' : 'FAIL'} float32: largest logit error ${exact.max_delta.toExponential(2)} (bound ${BOUND}), ` +
      `${exact.routes.differing} of ${exact.routes.compared} routings differ`,
    `${rounded.no_further ? 'PASS' : 'FAIL'} bfloat16 from their float32: ours ${of(ours)}; theirs ${of(theirs)}; ` +
      `ours further by ${kl_further.mean.toExponential(1)} with a standard error of ${kl_further.standard_error.toExponential(1)} (${ours.rows} rows)`,
  ];
}
