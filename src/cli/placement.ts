// Who started this process and which node of the run it is: the flags, or what torchrun, Open MPI, Slurm or a
// Kubernetes LeaderWorkerSet say in the environment. A node is one `tp-run` that someone started.

import { fail } from '../errors.js';
import { expandHostlist, expandTasks } from './hostlist.js';

export interface Placement {
  /** `torchrun`, `Slurm`, ...; null = nobody: this process starts all ranks itself. */
  source: string | null;
  node: number;
  nodes: number;
  /** Where the nodes meet: node 0's address, or a name for processes of one host. Null with one node. */
  meeting: { kind: 'tcp'; host: string; port: number } | { kind: 'ipc'; name: string } | null;
  /** The launcher started a task for every rank: this one's number on its host. Null = `--gpus` counts the node's ranks. */
  localRank: number | null;
  /** Nodes on this host, which share its cores. */
  localNodes: number;
}

/** What the flags say; null = not given. */
export interface PlacementFlags {
  nnodes: number | null;
  nodeRank: number | null;
  masterAddr: string | null;
  masterPort: number | null;
}

/** torchrun's own default. */
const MASTER_PORT = 29_500;

const ALONE: Placement = {
  source: null,
  node: 0,
  nodes: 1,
  meeting: null,
  localRank: null,
  localNodes: 1,
};

/** TP_LAUNCHER when what is said does not fit together. */
export function readPlacement(flags: PlacementFlags, env: NodeJS.ProcessEnv): Placement {
  if (flags.nnodes !== null) return fromFlags(flags);
  const found =
    fromTorchrun(flags, env) ?? fromOpenMpi(flags, env) ?? fromSlurm(flags, env) ?? fromSet(flags, env);
  if (!found && (flags.nodeRank ?? 0) > 0) throw refuse('the flags', '--node-rank without --nnodes');
  return found ?? ALONE;
}

function fromFlags({ nnodes, nodeRank, masterAddr, masterPort }: PlacementFlags): Placement {
  if (nnodes === 1) return ALONE;
  if (nodeRank === null) throw refuse('the flags', `--nnodes ${nnodes} needs --node-rank`);
  if (masterAddr === null) throw refuse('the flags', `--nnodes ${nnodes} needs --master-addr`);
  const meeting = { kind: 'tcp', host: masterAddr, port: masterPort ?? MASTER_PORT } as const;
  return checked({
    source: 'the flags',
    node: nodeRank,
    nodes: nnodes!,
    meeting,
    localRank: null,
    localNodes: 1,
  });
}

/** One process per rank. Without LOCAL_RANK (PyTorchJob) the same names count nodes. */
function fromTorchrun(flags: PlacementFlags, env: NodeJS.ProcessEnv): Placement | null {
  const { RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: port } = env;
  if (RANK === undefined || WORLD_SIZE === undefined || MASTER_ADDR === undefined) return null;
  const source = 'torchrun';
  const nodes = number(source, { WORLD_SIZE });
  const localNodes = LOCAL_WORLD_SIZE === undefined ? 1 : number(source, { LOCAL_WORLD_SIZE });
  // where torchrun's agent keeps its own store, the port is taken
  const taken = env.TORCHELASTIC_USE_AGENT_STORE === 'True' ? 1 : 0;
  const said = port === undefined ? MASTER_PORT : number(source, { MASTER_PORT: port });
  return checked({
    source,
    node: number(source, { RANK }),
    nodes,
    meeting:
      localNodes === nodes
        ? { kind: 'ipc', name: `torchrun-${word(env.TORCHELASTIC_RUN_ID ?? 'none')}-${said}` }
        : { kind: 'tcp', host: flags.masterAddr ?? MASTER_ADDR, port: flags.masterPort ?? said + taken },
    localRank: LOCAL_RANK === undefined ? null : number(source, { LOCAL_RANK }),
    localNodes,
  });
}

function fromOpenMpi(flags: PlacementFlags, env: NodeJS.ProcessEnv): Placement | null {
  const {
    OMPI_COMM_WORLD_RANK,
    OMPI_COMM_WORLD_SIZE,
    OMPI_COMM_WORLD_LOCAL_RANK,
    OMPI_COMM_WORLD_LOCAL_SIZE,
  } = env;
  if (OMPI_COMM_WORLD_RANK === undefined) return null;
  const source = 'Open MPI';
  const nodes = number(source, { OMPI_COMM_WORLD_SIZE });
  const localNodes = number(source, { OMPI_COMM_WORLD_LOCAL_SIZE });
  const oneHost = localNodes === nodes;
  if (!oneHost && flags.masterAddr === null)
    throw refuse(
      source,
      'over several hosts it does not name one: give --master-addr, an address of the first',
    );
  const job = env.PMIX_NAMESPACE ?? env.OMPI_MCA_ess_base_jobid ?? env.PMIX_SERVER_URI2 ?? 'job';
  return checked({
    source,
    node: number(source, { OMPI_COMM_WORLD_RANK }),
    nodes,
    meeting: oneHost
      ? { kind: 'ipc', name: `mpi-${word(job)}` }
      : { kind: 'tcp', host: flags.masterAddr!, port: flags.masterPort ?? MASTER_PORT },
    // one task on each of several hosts leads the ranks of that host
    localRank:
      localNodes > 1 || nodes === 1 ? taskRank(nodes, number(source, { OMPI_COMM_WORLD_LOCAL_RANK })) : null,
    localNodes,
  });
}

/** Steps that are no `srun`: a batch script, an interactive shell. */
const FIRST_SPECIAL_STEP = 0xffff_fff0;

/** One task per node leads that node's ranks; several per node are a rank each. */
function fromSlurm(flags: PlacementFlags, env: NodeJS.ProcessEnv): Placement | null {
  const { SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID } = env;
  const SLURM_STEP_ID = env.SLURM_STEP_ID ?? env.SLURM_STEPID;
  if (SLURM_PROCID === undefined || SLURM_STEP_ID === undefined) return null;
  const source = 'Slurm';
  const step = number(source, { SLURM_STEP_ID });
  if (step >= FIRST_SPECIAL_STEP) return null;
  const nodes = number(source, { SLURM_STEP_NUM_TASKS: env.SLURM_STEP_NUM_TASKS ?? env.SLURM_NTASKS });
  const tasks = expandTasks(env.SLURM_STEP_TASKS_PER_NODE ?? env.SLURM_TASKS_PER_NODE ?? String(nodes));
  const hosts = expandHostlist(env.SLURM_STEP_NODELIST ?? env.SLURM_JOB_NODELIST ?? 'localhost');
  const job = number(source, { SLURM_JOB_ID: env.SLURM_JOB_ID ?? env.SLURM_JOBID });
  const localNodes = tasks[number(source, { SLURM_NODEID })] ?? 1;
  const port = MASTER_PORT + ((job + step) % 1000); // jobs that share a host must not meet
  return checked({
    source,
    node: number(source, { SLURM_PROCID }),
    nodes,
    meeting:
      localNodes === nodes
        ? { kind: 'ipc', name: `slurm-${job}-${step}` }
        : { kind: 'tcp', host: flags.masterAddr ?? hosts[0]!, port: flags.masterPort ?? port },
    localRank: tasks.some((count) => count > 1) ? number(source, { SLURM_LOCALID }) : null,
    localNodes,
  });
}

/** A Kubernetes LeaderWorkerSet: one pod per node. */
function fromSet(flags: PlacementFlags, env: NodeJS.ProcessEnv): Placement | null {
  const { LWS_LEADER_ADDRESS, LWS_GROUP_SIZE, LWS_WORKER_INDEX } = env;
  if (LWS_LEADER_ADDRESS === undefined || LWS_GROUP_SIZE === undefined) return null;
  const source = 'LeaderWorkerSet';
  return checked({
    source,
    node: number(source, { LWS_WORKER_INDEX }),
    nodes: number(source, { LWS_GROUP_SIZE }),
    meeting: {
      kind: 'tcp',
      host: flags.masterAddr ?? LWS_LEADER_ADDRESS,
      port: flags.masterPort ?? MASTER_PORT,
    },
    localRank: null,
    localNodes: 1,
  });
}

/** A single task may lead several ranks: then it is none itself. */
function taskRank(nodes: number, local: number): number | null {
  return nodes === 1 ? null : local;
}

function checked(place: Placement): Placement {
  const { source, node, nodes } = place;
  if (nodes < 1 || node >= nodes) throw refuse(source!, `this is node ${node} of ${nodes}`);
  return nodes === 1 ? { ...ALONE, source } : place;
}

/** The value of one variable, given as `{ NAME: value }`; a whole number. */
function number(source: string, variable: Record<string, string | undefined>): number {
  const [[name, value]] = Object.entries(variable) as [[string, string | undefined]];
  if (value === undefined || !/^\d{1,10}$/.test(value))
    throw refuse(
      source,
      `${name} is ${value === undefined ? 'not set' : JSON.stringify(value)}, not a whole number`,
    );
  return Number(value);
}

/** A part of a file name. */
function word(text: string): string {
  return text.replace(/[^\w-]/g, '_').slice(0, 40);
}

function refuse(source: string, why: string): Error {
  return fail('TP_LAUNCHER', source, why);
}
