// What doctor finds out about GPUs: who drives them, how they are joined, how fast they read and add.

import { dirname, join } from 'node:path';
import { type CollectiveName, chooseCollective } from '../comm/collective.js';
import { gpuFacts } from '../engine/gpus.js';
import type { Run } from '../engine/launcher.js';
import { EXIT, TpError } from '../errors.js';
import { DEFAULT_CONFIG_FILE } from '../model/configfile.js';
import { native } from '../native.js';
import { driverOfProc } from '../report/machine.js';
import type { GpuReport } from '../report/schema.js';
import { quantile } from '../report/stats.js';
import { openModel } from './model.js';
import { environment, type Options } from './options.js';
import { withRun } from './session.js';
import { runSpec } from './spec.js';

/** Real widths, and few enough layers to be there in a moment; its weights do not fit a second-level cache. */
const MODEL = join(dirname(DEFAULT_CONFIG_FILE), 'gemma-4-26b-a4b-3layers.json');
const BANDWIDTH_S = 0.5;
/** Floats of a sum in decoding: one sequence, and eight with two halves. */
const FLOATS = [2816, 45_056];

/** What the driver, NVML and NCCL say without any run. */
export function readGpus(): Omit<GpuReport, 'all_reduce' | 'not_measured'> {
  const { devices, nccl } = native().cuda();
  const { driver, cuda, nvlinks, pci, ipc, pairs } = native().topology();
  return {
    driver: driver || driverOfProc(),
    cuda: cuda || null,
    nccl,
    devices: devices.map((device, index) => ({
      index,
      name: device.name,
      compute_capability: device.computeCapability,
      free_bytes: device.freeBytes,
      total_bytes: device.totalBytes,
      pci: pci[index]!,
      nvlinks: nvlinks[index]! < 0 ? null : nvlinks[index]!,
      ipc: ipc[index] === '',
      read_gb_per_s: null,
    })),
    links: pairs,
  };
}

/**
 * Measures on `devices`, one rank on each: streaming reads, and the all-reduce by every collective that works here.
 * What cannot be measured is named with the reason.
 */
export async function measureGpus(options: Options, devices: readonly number[]): Promise<GpuReport> {
  const report: GpuReport = { ...readGpus(), all_reduce: [], not_measured: [] };
  const measured = async (what: string, work: () => Promise<void>) => {
    try {
      await work();
    } catch (error) {
      if (!(error instanceof TpError) || error.exitCode === EXIT.interrupted) throw error;
      report.not_measured.push({ what, why: error.message.split('\n')[0]! });
    }
  };
  const probe = (collective: Options['collective'], work: (run: Run) => Promise<void>) => {
    const chosen = { device: 'cuda' as const, devices, line: null };
    const needs = { ranks: devices.length, sequences: 1, positions: 1, everyRow: false, candidates: 1 };
    const model = openModel(MODEL, null);
    const spec = runSpec({ ...options, collective }, model, chosen, { ...needs, trace: false });
    return withRun(options, spec, ({ run }) => work(run));
  };

  await measured('read bandwidth', () =>
    probe(devices.length > 1 ? 'zmq' : 'auto', async (run) => {
      const results = await run.execute({ kind: 'read-bandwidth', seconds: BANDWIDTH_S });
      for (const [rank, result] of results.entries())
        if (result.kind === 'read-bandwidth') report.devices[devices[rank]!]!.read_gb_per_s = result.gbPerS;
      if (devices.length > 1) await sums(run, 'zmq', report);
    }),
  );
  if (devices.length < 2) {
    report.not_measured.push({ what: 'all-reduce', why: 'one GPU' });
    return report;
  }
  for (const name of ['peer', 'nccl'] as const) {
    await measured(`all-reduce by ${name}`, async () => {
      chooseCollective(name, { ranks: devices.length, device: 'cuda', devices, hosts: 1 }, () =>
        gpuFacts(environment()),
      );
      await probe(name, (run) => sums(run, name, report));
    });
  }
  return report;
}

async function sums(run: Run, collective: CollectiveName, report: GpuReport): Promise<void> {
  const results = await run.execute({ kind: 'allreduce', floats: FLOATS, warmup: 5, iterations: 50 });
  const ranks = results.map((result) => (result.kind === 'allreduce' ? result.sizes : []));
  for (const [i, { floats, launch, timesUs }] of ranks[0]!.entries()) {
    const slowest = timesUs.map((_, k) => Math.max(...ranks.map((sizes) => sizes[i]!.timesUs[k]!)));
    report.all_reduce.push({
      collective,
      launch,
      bytes: floats * 4,
      median_us: quantile(slowest, 0.5),
      wrong: ranks.reduce((sum, sizes) => sum + sizes[i]!.wrong, 0),
    });
  }
}

/** One line for each thing found. */
export function gpuLines(report: GpuReport): { what: string; status: 'ok' | 'note'; text: string }[] {
  const { devices, links, all_reduce, not_measured } = report;
  const gb = (bytes: number) => (bytes / 1e9).toFixed(1);
  const ok = (what: string, text: string) => ({ what, status: 'ok' as const, text });
  const unknown = 'not known: NVML cannot be asked';
  return [
    ok('driver', `${report.driver ?? 'version not known'}, for CUDA up to ${report.cuda ?? '(not known)'}`),
    ...devices.map((gpu) =>
      ok(
        `gpu ${gpu.index}`,
        `${gpu.name} (${gpu.compute_capability}, ${gpu.pci}), ${gb(gpu.free_bytes)} of ${gb(gpu.total_bytes)} GB free, ` +
          `NVLinks up: ${gpu.nvlinks ?? unknown}, CUDA IPC ${gpu.ipc ? 'works' : 'does not work'}, ` +
          (gpu.read_gb_per_s === null
            ? 'read bandwidth not measured'
            : `reads ${gpu.read_gb_per_s.toFixed(0)} GB/s`),
      ),
    ),
    ...links
      .filter(({ from, to }) => from < to)
      .map(({ from, to, access, atomics }) =>
        ok(`gpus ${from}, ${to}`, linkWords(access, atomics, devices[from]!.nvlinks)),
      ),
    ...[...new Set(all_reduce.map(({ collective }) => collective))].map((name) =>
      ok(`sum by ${name}`, sumWords(all_reduce.filter(({ collective }) => collective === name))),
    ),
    ...not_measured.map(({ what, why }) => ({ what, status: 'note' as const, text: `not measured: ${why}` })),
  ];
}

/** P2P with atomics is what NVLink has and PCIe lacks; NVML knows of links, not of where they end. */
function linkWords(access: boolean, atomics: boolean, nvlinks: number | null): string {
  if (!access) return 'no P2P access';
  const way = atomics ? 'NVLink' : nvlinks === 0 ? 'PCIe' : 'PCIe, or a link without atomics';
  return `P2P access over ${way}`;
}

function sumWords(sums: GpuReport['all_reduce']): string {
  const launched = { host: 'by the host', stream: 'launched one by one', graph: 'in a CUDA graph' } as const;
  return sums
    .map(({ bytes, launch, median_us, wrong }) => {
      const errors = wrong ? `, ${wrong} WRONG ELEMENTS` : '';
      return `${bytes} B ${launched[launch]} ${median_us?.toFixed(1)} us${errors}`;
    })
    .join('; ');
}
