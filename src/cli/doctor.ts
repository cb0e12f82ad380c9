// `tp-run doctor`: what this machine offers, and what a run would choose here and why.

import { accessSync, constants } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { chooseCollective } from '../comm/collective.js';
import { zeromqFacts } from '../comm/zeromq.js';
import { gpuFacts } from '../engine/gpus.js';
import { EXIT } from '../errors.js';
import { native } from '../native.js';
import { findLibrary, gpuNames, memoryGb, roomGb } from '../report/machine.js';
import { cpuModel, packageVersion } from '../report/provenance.js';
import type { DoctorResult } from '../report/schema.js';
import { chooseDevice } from './device.js';
import { gpuLines, measureGpus } from './gpu-probe.js';
import { defaultThreads, environment, type Options } from './options.js';
import { print, printJson } from './output.js';

/** NCCL and the workers' shared memory want at least this much of /dev/shm; containers often give 64 MB. */
const SHM_GB = 1;

/** More ranks than that share no model of configs/. */
const MOST_RANKS = 8;

type Finding = DoctorResult['findings'][number];

const PROBES: Record<string, (options: Options) => Omit<Finding, 'what'>> = {
  node: () => ok(`${process.version}, ${process.platform} ${process.arch}, tp-run ${packageVersion()}`),
  addon() {
    const { addon, isa } = native().version();
    return ok(`version ${addon}, CPU code for ${isa.join(', ')}`);
  },
  processor: ({ gpus }) =>
    ok(
      `${cpuModel()}, ${availableParallelism()} cores: ${defaultThreads(gpus.count)} threads for each of ${gpus.count} ranks`,
    ),
  memory() {
    const { total, free } = memoryGb();
    return ok(`${free} of ${total} GB free`);
  },
  gpu() {
    const names = gpuNames();
    return names.length ? ok(names.join(', ')) : note('the NVIDIA driver shows none');
  },
  cuda() {
    const { cuda } = native().version();
    const driver = findLibrary('libcuda.so.1');
    const where = driver ? `driver library in ${driver}` : 'no driver library (libcuda.so.1)';
    return cuda === null
      ? note(`not compiled with CUDA; ${where}`)
      : ok(`compiled with CUDA ${cuda}; ${where}`);
  },
  nccl() {
    const { nccl, ncclWhy } = native().cuda();
    return nccl === null ? note(`cannot be used: ${ncclWhy}`) : ok(nccl);
  },
  zeromq() {
    const { version, capabilities } = zeromqFacts();
    return ok(`libzmq ${version} with ${capabilities.join(', ')}`);
  },
  'shared memory'() {
    const room = roomGb('/dev/shm');
    if (!room) return note('there is no /dev/shm');
    const text = `/dev/shm: ${room.free} of ${room.total} GB free`;
    return room.total < SHM_GB ? note(`${text}; NCCL may need more: docker run --shm-size=1g`) : ok(text);
  },
  'temporary folder'() {
    accessSync(tmpdir(), constants.W_OK | constants.X_OK);
    return ok(`${tmpdir()} can be written`);
  },
  device(options) {
    const { device, devices, line } = chooseDevice(options);
    return ok(line ?? `${device}${devices.length ? ` ${devices.join(', ')}` : ''}`);
  },
  collective(options) {
    const { device, devices } = chooseDevice(options);
    return ok(
      chooseCollective('auto', { ranks: options.gpus.count, device, devices, hosts: 1 }, () =>
        gpuFacts(environment()),
      ).why,
    );
  },
};

export async function doctor(given: Options): Promise<number> {
  const options = { ...given, gpus: allGpus(given) };
  const findings = Object.entries(PROBES).map(
    ([what, probe]): Finding => ({ what, ...tried(() => probe(options)) }),
  );
  const can_run = findings.every(({ status }) => status !== 'fail');
  const { device, devices } = can_run ? chooseDevice(options) : { device: 'cpu', devices: [] };
  const gpus = device === 'cuda' ? await measureGpus(options, [...new Set(devices)]) : null;
  if (gpus) findings.push(...gpuLines(gpus));
  const result: DoctorResult = { schema: 'tp-run/doctor/1', can_run, findings, gpus };
  if (options.json) printJson(result);
  else print(lines(result));
  return result.can_run ? EXIT.ok : EXIT.input;
}

/** Where no number of ranks is asked for: as many GPUs as one run can use, or one rank. */
function allGpus({ gpus, device }: Options): Options['gpus'] {
  if (gpus.devices || gpus.count > 1 || device === 'cpu') return gpus;
  const found = native().cuda().devices.length;
  return { count: 2 ** Math.floor(Math.log2(Math.min(Math.max(found, 1), MOST_RANKS))), devices: null };
}

/** A probe that throws has found why tp-run cannot run here. */
function tried(probe: () => Omit<Finding, 'what'>): Omit<Finding, 'what'> {
  try {
    return probe();
  } catch (error) {
    return { status: 'fail', text: (error as Error).message };
  }
}

function ok(text: string): Omit<Finding, 'what'> {
  return { status: 'ok', text };
}

function note(text: string): Omit<Finding, 'what'> {
  return { status: 'note', text };
}

function lines({ findings, can_run }: DoctorResult): string {
  const width = Math.max(...findings.map(({ what }) => what.length));
  const rows = findings.map(
    ({ what, status, text }) => `${status.padEnd(4)}  ${what.padEnd(width)}  ${text}\n`,
  );
  return `${rows.join('')}${can_run ? 'tp-run can run here' : 'tp-run cannot run here: see the lines with fail'}\n`;
}
